"""From last hidden states to log-probabilities, entropy and loss of label tokens, the vocabulary split over ranks.

May import objectives."""
