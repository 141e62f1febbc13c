"""What a graph is made of: the op table, rewriting helpers, the pass manager, integer operations."""
