"""The plumbing: ways to read bytes that another node holds. Knows nothing of versions, updates or engines.

`base` says what every transport does, `registry` gives one by its name; `tcp` and `memory` are there now.
"""
