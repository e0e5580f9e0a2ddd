"""What both sides of the wire share and stubs cannot say: endpoints, channel limits, errors."""
