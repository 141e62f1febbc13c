"""Writers of the integer program, one target format a file."""
