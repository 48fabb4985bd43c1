"""The run's configuration: what can be set (schema), how it is read (flags), what must hold across fields (rules).

Imports no torch. May import objectives."""
