"""The HTML report: one offline page of a result folder, of which nothing is trusted and nothing is run."""
