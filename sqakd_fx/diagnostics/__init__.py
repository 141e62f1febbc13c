"""How errors are worded, and which line of the user's code they name."""
