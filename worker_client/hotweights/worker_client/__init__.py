"""The kitchen: what runs on a node. Session, agent, stage, image, window."""
