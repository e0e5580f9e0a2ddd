"""Images on this node: reserved, filled, verified, mapped, pinned, and given up again."""
