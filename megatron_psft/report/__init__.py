"""Reports of runs, from the files that they leave: reading them (runs), drawing them (charts), the HTML page (page).

May import metrics."""
