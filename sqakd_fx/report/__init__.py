"""What is shown of result folders, of which nothing is trusted and nothing is run: the HTML page, a comparison."""
