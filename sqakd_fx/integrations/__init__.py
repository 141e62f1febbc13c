"""Models of other libraries whose forward does more than a file can."""
