"""Where quantizers stand, and with how many bits."""
