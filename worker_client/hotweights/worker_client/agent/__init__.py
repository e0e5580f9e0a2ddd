"""The node's agent: one process that stages images for every engine on the node and re-serves them."""
