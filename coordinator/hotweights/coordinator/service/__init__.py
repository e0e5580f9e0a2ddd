"""The edge: messages in and out, statuses, streams. Decides nothing."""
