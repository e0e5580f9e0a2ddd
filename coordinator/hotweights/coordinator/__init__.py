"""The study: versions, plans, updates and events. No torch, no weights, no transport."""
