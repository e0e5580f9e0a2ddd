"""A fleet that drops, doubles, reorders, delays, restarts and hangs, from one seed; and what must hold throughout.

    Member (agent, engine) --outbox--> wire --> Leader: step, step, one write, speak --> Member's orders

The leader works as runtime.py does: a batch of events, one write, then the orders. It may die before the write, or
after it and before it spoke. Members obey as the worker side does; every act takes one turn of the dice.
"""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from hotweights.coordinator import ledger
from hotweights.coordinator.rules import Declined, Order, State, step
from hotweights.coordinator.rules import events as e
from hotweights.coordinator.rules import orders as o
from hotweights.coordinator.rules.records import (
    Decision,
    FailurePolicy,
    Kind,
    Options,
    Outcome,
    Phase,
    Policy,
    Ticket,
    UpdateRecord,
    WindowTimes,
)
from hotweights.coordinator.rules.state import Limits
from hotweights.coordinator.rules.waves import share
from hotweights.coordinator.store import Batch, Opened

LIMITS = Limits(lease_s=15, go_validity_s=10, roll_back_deadline_s=120, forget_s=300)
IN_WINDOW = (Outcome.APPLYING, Outcome.RESTORING)
LEFT_OUT = (Outcome.EXCLUDED, Outcome.TORN, Outcome.FAILED)


@dataclass
class Member:
    """What an agent and an engine have in common: a life, a session, orders that wait and reports that wait."""

    name: str
    life: int = 0
    session: str = ""
    orders: deque[o.Tell] = field(default_factory=deque)
    outbox: deque[e.Event] = field(default_factory=deque)
    hung_until: float = 0.0


@dataclass
class Agent(Member):
    held: set[str] = field(default_factory=set)


@dataclass
class Engine(Member):
    node: str = ""
    boots: str = ""
    active: str = ""
    # The version before, while it can be put back.
    kept: str | None = None
    window: tuple[o.Tell, float] | None = None
    # Digests it came to serve, by the update that brought them, in this life.
    came: set[tuple[str, str]] = field(default_factory=set)
    # When it last began a life.
    born_at: float = 0.0
    # What it has installed, as its two ranks prove it.
    proof: tuple[str, ...] = ()


class Broken(AssertionError):
    """An invariant does not hold; the text says which."""


class World:
    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        # Dice of their own: what is installed goes wrong where everything else goes as it would.
        self.flips = random.Random(seed + 1_000_000)
        self.now = 1000.0
        self.epoch = 0
        self.disk: dict[str, bytes] = {}
        self.wire: deque[e.Event] = deque()
        self.count = 0
        self.options = Options(
            failure_policy=self.dice.choice(list(FailurePolicy)),
            canary=self.dice.choice([1, 1, 2]),
            max_unavailable=self.dice.choice(["1", "50%", "100%"]),
            max_failed=self.dice.choice(["1", "50%"]),
            staging_deadline_s=60,
            quiesce_deadline_s=5,
            apply_deadline_s=20,
        )
        self.calm = False
        self.ended: set[str] = set()
        self.commits = 0
        self.rollbacks = 0
        self.differed = 0
        count = self.dice.choice([1, 2, 3, 4])
        self.agents = {f"n{i}": Agent(f"n{i}", held={"d1", "d2"} if i == 0 else {"d1"}) for i in range(min(count, 3))}
        self.engines = {
            f"r{i}": Engine(f"r{i}", node=f"n{i % len(self.agents)}", boots=self.dice.choice(["d1", "d1", "d1", ""]))
            for i in range(count)
        }
        for engine in self.engines.values():
            engine.active, engine.proof = engine.boots, proof_of(engine.boots)
        self.lead()
        self.work([e.VersionPublished(self.now, "m", f"v{i}", f"d{i}", 1, 1, 1) for i in (1, 2, 3)])
        for member in self.members():
            self.connect(member)
        self.work(list(self.wire))
        self.wire.clear()

    def members(self) -> Iterator[Member]:
        yield from self.agents.values()
        yield from self.engines.values()

    # The leader.

    def lead(self) -> None:
        """Starts, or starts again after a crash: only what was written is left."""
        self.epoch += 1
        opened = Opened("cluster", self.epoch, dict(self.disk), 0)
        self.state = ledger.restored(opened, LIMITS, self.now)
        self.wire.clear()
        for member in self.members():
            member.session = ""

    def work(self, events: list[e.Event], dies: str = "") -> None:
        """One batch, as Runtime._work: all steps, one write, then the orders."""
        state, said = self.state, list[Order]()
        for event in events:
            try:
                state, more = step(state, event)
            except Declined:
                continue
            said += more
            if speaks_go(more):
                # The runtime ends its batch here: what follows could take GO back before it is told.
                rest = events[events.index(event) + 1 :]
                self.wire.extendleft(reversed(rest))
                break
        if dies == "before the write":
            self.lead()
            return
        self.write(ledger.changes(self.state, state), self.state, state)
        if dies == "after the write":
            self.lead()
            return
        self.state = state
        for order in said:
            self.speak(order)

    def write(self, batch: Batch, before: State, after: State) -> None:
        self.disk.update(batch.puts)
        for key in batch.deletes:
            self.disk.pop(key, None)
        check_decisions(before, after)
        check_windows(after)
        for update in after.updates.values():
            if not update.phase.is_open and update.id not in self.ended:
                self.ended.add(update.id)
                self.check_ended(update, after)

    def speak(self, order: Order) -> None:
        match order:
            case o.Tell():
                member: Member = self.agents.get(order.member) or self.engines[order.member]
                check_told(order, self.state)
                if member.session == order.session:
                    member.orders.append(order)
            case o.Drop():
                for dropped in self.members():
                    if dropped.session == order.session:
                        dropped.session = ""
                        self.wire.append(e.Left(self.now, dropped.name, order.session))

    # Members.

    def connect(self, member: Member) -> None:
        self.count += 1
        member.session = f"s{self.count}"
        life = f"{member.name}.{member.life}"
        if isinstance(member, Agent):
            held = frozenset(member.held)
            self.wire.append(e.AgentAttached(self.now, member.name, member.session, life, "tcp://x", held))
            return
        assert isinstance(member, Engine)
        self.wire.append(
            e.ReplicaAttached(
                self.now,
                member.name,
                member.session,
                life,
                "m",
                None,
                ((0, member.node, 1),),
                member.active,
                open_window=member.window[0].update if member.window else "",
                fingerprints=member.proof,
                fingerprint_kind="one kind",
            )
        )

    def disconnect(self, member: Member) -> None:
        if member.session:
            self.wire.append(e.Left(self.now, member.name, member.session))
            member.session = ""
            # Orders on the stream are lost; those the process took stay with it.
            if self.dice.random() < 0.5:
                member.orders.clear()

    def restart(self, member: Member) -> None:
        self.disconnect(member)
        member.life += 1
        member.orders.clear()
        member.outbox.clear()
        if isinstance(member, Engine):
            member.active, member.kept, member.window = member.boots, None, None
            member.proof = proof_of(member.boots)
            member.came.clear()
            member.born_at = self.now

    def send(self, member: Member) -> None:
        """Flushes one report; the wire may double it, or swap it with the one before."""
        if not member.session:
            return
        if not member.outbox:
            self.wire.append(e.Beat(self.now, member.name, member.session))
            return
        report = replace(member.outbox.popleft(), now=self.now, session=member.session)  # type: ignore[call-arg]
        self.wire.append(report)
        if not self.calm and self.dice.random() < 0.1:
            self.wire.append(report)
        if not self.calm and self.dice.random() < 0.1 and len(self.wire) > 1:
            a, b = self.wire[-2], self.wire[-1]
            if not isinstance(a, e.ReplicaAttached | e.AgentAttached | e.Left):
                self.wire[-2], self.wire[-1] = b, a

    def say(self, member: Member, kind: type[e.FromMember], *fields: Any, **more: Any) -> None:
        member.outbox.append(kind(self.now, member.name, "", *fields, **more))

    def act(self, member: Member) -> None:
        if member.hung_until > self.now:
            return
        if isinstance(member, Engine) and member.window is not None:
            order, ready_at = member.window
            if self.now >= ready_at:
                member.window = None
                self.close_window(member, order)
            return
        if not member.orders:
            return
        order = member.orders.popleft()
        if isinstance(member, Agent):
            self.stage(member, order)
        else:
            assert isinstance(member, Engine)
            self.obey(member, order)

    def fails(self, chance: float) -> bool:
        return not self.calm and self.dice.random() < chance

    def stage(self, agent: Agent, order: o.Tell) -> None:
        match order.action:
            case o.Pin(digests):
                if self.dice.random() < 0.3 and agent.held - digests and agent.name != "n0":
                    agent.held &= digests
                    self.say(agent, e.HeldChanged, frozenset(agent.held), 0, 0)
            case o.Stage(digest, sources):
                here = digest in agent.held or any(digest in self.agents[name].held for name in sources)
                if self.fails(0.04) or not here:
                    self.say(agent, e.StageFailed, order.update, digest, "disk")
                else:
                    agent.held.add(digest)
                    self.say(agent, e.Staged, order.update, digest)

    def obey(self, engine: Engine, order: o.Tell) -> None:
        match order.action:
            case o.Prepare(digest):
                if self.fails(0.03) or digest not in self.agents[engine.node].held:
                    self.say(engine, e.PrepareFailed, order.update, order.ticket, "shapes")
                else:
                    engine.kept = None
                    self.say(engine, e.Prepared, order.update, order.ticket, engine.active)
            case o.Apply():
                slow = self.dice.choice([0.0, 0.0, 1.0, 4.0, 30.0, 90.0]) if not self.calm else 0.0
                engine.window = (order, self.now + slow)
            case o.End():
                engine.kept = None

    def close_window(self, engine: Engine, order: o.Tell) -> None:
        go = order.action
        assert isinstance(go, o.Apply)
        who = (order.update, order.ticket)
        if go.digest == engine.active:
            engine.came.add((order.update, go.digest))
            self.say(engine, e.Applied, *who, engine.active, WindowTimes(), engine.proof)
        elif self.fails(0.05):
            self.say(engine, e.ApplyFailed, *who, "torn", engine.active, torn=True)
            self.send(engine)
            self.restart(engine)
        elif self.fails(0.08) or (go.restore and not go.digest and engine.kept != ""):
            self.say(engine, e.ApplyFailed, *who, "undone", engine.active)
        else:
            engine.kept = engine.active if not go.restore else None
            engine.active, engine.proof = go.digest, proof_of(go.digest)
            if not self.calm and self.flips.random() < 0.2:
                engine.proof = (engine.proof[0], f"flipped {self.flips.random()}")
            engine.came.add((order.update, go.digest))
            self.say(engine, e.Applied, *who, engine.active, WindowTimes(), engine.proof)

    # What must hold.

    def check_ended(self, update: UpdateRecord, after: State) -> None:
        """Of an update whose end was just written."""
        if update.phase is Phase.COMMITTED:
            self.commits += 1
            self.check_committed(update)
            self.check_agreed(update, after)
        elif update.phase is Phase.ROLLED_BACK:
            self.rollbacks += 1
            self.differed += "another fingerprint" in update.reason
            for member in update.members.values():
                engine = self.engines[member.replica]
                restored = member.outcome is Outcome.RESTORED and engine.born_at < update.started_at
                if restored and engine.window is None and engine.active != member.base:
                    raise Broken(f"{update.id} is rolled back and {member.replica} serves {engine.active}")
                spared = member.outcome not in (*LEFT_OUT, Outcome.RESTORED, Outcome.DIVERGED, Outcome.APPLIED)
                if spared and (update.id, update.target_digest) in engine.came:
                    raise Broken(f"{update.id}: {member.replica} is {member.outcome}, and it served the target")
        elif any(update.id == brought for engine in self.engines.values() for brought, _ in engine.came):
            raise Broken(f"{update.id} is aborted, and somebody served its target")

    def check_committed(self, update: UpdateRecord) -> None:
        """A silent replica never lets an update commit: whoever counts did serve it, the rest is left out by name."""
        out = 0
        for member in update.members.values():
            engine = self.engines[member.replica]
            reborn = engine.born_at >= update.started_at
            served = (update.id, update.target_digest) in engine.came or member.base == update.target_digest
            if member.outcome is Outcome.APPLIED and not (served or reborn or member.ticket is None):
                raise Broken(f"{update.id} is committed, and {member.replica} never served it")
            if member.outcome is not Outcome.APPLIED:
                out += 1
                if member.outcome not in LEFT_OUT or update.options.failure_policy is not FailurePolicy.EVICT:
                    raise Broken(f"{update.id} is committed with {member.replica} {member.outcome}")
        if out and (out > share(update.options.max_failed, len(update.members)) or out == len(update.members)):
            raise Broken(f"{update.id} is committed with {out} of {len(update.members)} left behind")

    def check_agreed(self, update: UpdateRecord, after: State) -> None:
        """Those that this update wrote, that serve it still and that the leader knows of, have the same installed."""
        proofs = {
            engine.proof
            for name, engine in self.engines.items()
            if name in update.members
            and name in after.seats
            and (update.id, update.target_digest) in engine.came
            and engine.active == update.target_digest
            and update.members[name].outcome is Outcome.APPLIED
        }
        if len(proofs) > 1:
            raise Broken(f"{update.id} is committed with {proofs}")

    # The dice.

    def run(self, turns: int) -> None:
        for _ in range(turns):
            self.turn()
        self.settle()

    def turn(self) -> None:
        for member in self.members():
            if self.dice.random() < 0.6:
                self.act(member)
            if self.dice.random() < 0.6:
                self.send(member)
            if not member.session and self.dice.random() < 0.2:
                self.connect(member)
        roll = self.dice.random()
        member = self.dice.choice(list(self.members()))
        if roll < 0.75:
            batch = [self.wire.popleft() for _ in range(min(len(self.wire), self.dice.randint(1, 12)))]
            dies = self.dice.choice(["before the write", "after the write"]) if self.dice.random() < 0.02 else ""
            self.work(batch, dies)
        elif roll < 0.90:
            self.now += self.dice.choice([0.1, 1.0, 1.0, 3.0, 10.0])
            self.wire.append(e.Ticked(self.now))
        elif roll < 0.93:
            self.disconnect(member)
        elif roll < 0.94:
            self.restart(member)
        elif roll < 0.95:
            member.hung_until = self.now + self.dice.choice([5.0, 50.0, 400.0])
        else:
            self.wire.append(self.wish())

    def wish(self) -> e.Event:
        """What a person asks."""
        version = self.dice.choice(["v1", "v2", "v2", "v3", ""])
        opened = [u.id for u in self.state.updates.values() if u.phase.is_open]
        match self.dice.randint(0, 9):
            case 0 | 1 | 2 | 3 | 4:
                return e.UpdateAsked(self.now, "m", version, self.options)
            case 5 if opened:
                return e.CancelAsked(self.now, self.dice.choice(opened))
            case 6:
                return e.UpdateAsked(self.now, "m", "", self.options, Kind.ROLLBACK)
            case 7:
                return e.PolicySet(self.now, "m", self.dice.choice(list(Policy)))
            case 8:
                return e.ModelResumed(self.now, "m")
            case _:
                return e.ReplicaUndrained(self.now, self.dice.choice(list(self.engines)))

    def settle(self) -> None:
        """Nothing fails any more; everything that waits is done, and time passes until nothing does."""
        self.calm = True
        self.work([e.PolicySet(self.now, "m", Policy.MANUAL)])
        for _ in range(600):
            for member in self.members():
                if not member.session:
                    self.connect(member)
                for _ in range(4):
                    self.act(member)
                    self.send(member)
            while self.wire:
                self.work([self.wire.popleft()])
            self.now += 3.0
            self.work([e.Ticked(self.now)])
            if self.at_rest():
                break
        self.check_rest()

    def at_rest(self) -> bool:
        waiting = any(m.orders or m.outbox or m.hung_until > self.now for m in self.members())
        windows = any(engine.window for engine in self.engines.values())
        later = any(record.retry_at > self.now for record in self.state.replicas.values())
        opened = any(update.phase.is_open for update in self.state.updates.values())
        return not (waiting or windows or later or opened or self.wire)

    def check_rest(self) -> None:
        for update in self.state.updates.values():
            if update.phase.is_open:
                raise Broken(f"{update.id} never ends: {update}")
        for name, engine in self.engines.items():
            record, seat = self.state.replicas[name], self.state.seats[name]
            if seat.active != engine.active:
                raise Broken(f"{name} serves {engine.active}; the coordinator believes {seat.active}")
            if not record.excluded and record.desired and engine.active != record.desired:
                raise Broken(f"{name} serves {engine.active} and should serve {record.desired}")


def proof_of(digest: str) -> tuple[str, ...]:
    return (f"{digest} rank 0", f"{digest} rank 1") if digest else ()


def speaks_go(said: tuple[Order, ...]) -> bool:
    return any(isinstance(order, o.Tell) and isinstance(order.action, o.Apply) for order in said)


def check_decisions(before: State, after: State) -> None:
    """The decision is written once, and the committed version changes with a COMMIT and never else."""
    for update in before.updates.values():
        later = after.updates.get(update.id)
        if later is not None and update.decision is not Decision.NONE and later.decision is not update.decision:
            raise Broken(f"{update.id} was decided {update.decision}, and then {later.decision}")
    for name, model in after.models.items():
        old = before.models.get(name)
        if old is None or old.committed == model.committed:
            continue
        newly = [
            update.target
            for update in after.updates.values()
            if update.decision is Decision.COMMIT
            and (update.id not in before.updates or before.updates[update.id].decision is Decision.NONE)
        ]
        if model.committed not in newly:
            raise Broken(f"{name} is committed to {model.committed} without a COMMIT")


def check_windows(state: State) -> None:
    """At most one open window a replica."""
    outstanding: set[str] = set()
    for update in state.updates.values():
        for member in update.members.values():
            if update.phase.is_open and member.outcome in IN_WINDOW:
                if member.replica in outstanding:
                    raise Broken(f"{member.replica} has two orders outstanding")
                outstanding.add(member.replica)


def check_told(order: o.Tell, state: State) -> None:
    """No Apply is told that the durable record does not want."""
    if not isinstance(order.action, o.Apply):
        return
    desired = state.replicas[order.member].desired
    if desired != order.action.digest:
        raise Broken(f"{order.member} is told to apply {order.action.digest}; durable is {desired}")
    update = state.updates[order.update]
    if update.members[order.member].ticket != order.ticket:
        raise Broken(f"{order.member} is told an order that no record names: {Ticket}")
