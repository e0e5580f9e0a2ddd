"""The rules: `step(state, event) -> (state, orders)`. No clock, no I/O, no gRPC, no logging.

`now` rides on events. Records are durable, the rest is rebuilt from what members say of themselves.
A move that is not allowed raises `Declined` and changes nothing.

    events.py   what happened            orders.py   what is to be said
    records.py  what is durable          state.py    all there is
    step.py     the table of events      update.py   an update's way through its phases
    fleet.py    who is there             reports.py  what they report
    catalogue.py  versions and policies
    agreement.py  whether replicas of a version have the same installed
"""

from hotweights.coordinator.rules.orders import Declined, Order
from hotweights.coordinator.rules.state import State
from hotweights.coordinator.rules.step import step

__all__ = ["Declined", "Order", "State", "step"]
