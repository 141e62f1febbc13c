"""Whether an exported file computes what was trained."""
