"""The fleet simulator: the real state machines on virtual time, one thread, one seed.

Coordinator and agents are built as the services build them and driven as ``broker.drive`` drives
them; their messages are encoded, framed, put together and validated by the code that runs in
production. Broker, network, time and misfortune are simulated, and every random choice comes from
one seed: the same seed gives the same run, byte for byte. With ``learning="stub"`` nothing is
learnt, but every batch is counted by devices, coordinator, engines and in the model itself.

A test of a fault::

    fleet = SimulatedFleet(
        make_settings(state_dir=tmp_path, min_devices=3, rounds=3, batches_per_round=8),
        [Device(f"d{i}", cut=2 + i, link=LinkProfile(latency_s=0.02),
                cost=DeviceCost(forward_s=0.005, backward_s=0.01)) for i in range(3)],
        seed=SEED,
        server=ServerCost(step_s=0.002),
    )
    # A fault at a time, or when something is so:
    fleet.world.at(1.0, fleet.agents["d1"].freeze)
    fleet.world.at(80.0, fleet.agents["d1"].thaw)
    fleet.when(lambda: fleet.agent("d0").phase == "training", fleet.agents["d0"].kill)
    fleet.world.at(30.0, fleet.agents["d0"].restart)
    # Faults of single messages:
    fleet.faults.add(Fault("lose", kind="gradients", device="d2", share=0.3, times=5))
    # A crash inside a step of the coordinator (or StoreError("disk full") instead of Killed):
    def crash(event: str) -> None:
        if event == "save:before":
            fleet.on_store = lambda event: None
            fleet.world.after(5.0, fleet.coordinator.restart)
            raise Killed
    fleet.on_store = crash

    fleet.run(limit_s=3600)         # FleetFailed if it does not come to its end
    fleet.books().check()           # every account balances, nothing twice, model finite
    assert fleet.checkpoint().round == 3

What can happen to a :class:`Process` (``fleet.coordinator``, ``fleet.agents[name]``): ``kill()``
(``power_cut=True``: the broker has to find out), ``restart()``, ``freeze()``/``thaw()``,
``partition()``/``heal()``, ``drop_connection()``, ``slow(factor)``, ``jump_clock(seconds)``;
``profile`` may be replaced for its next connection. To ``fleet.broker``: ``kill()``,
``restart(keep_sessions=…)``, ``freeze()``/``thaw()``, ``service_s``. To data: ``fleet.poisoned``
(NaN on a device), ``fleet.witnesses.diverging`` (NaN at the server),
``fleet.programs[name].disk.full`` or ``.lose()``, ``fleet.on_store``.
"""

from ops.simulator.books import Books
from ops.simulator.broker import Broker
from ops.simulator.charging import DeviceCost, ServerCost
from ops.simulator.faults import Fault, Faults
from ops.simulator.fleet import SimulatedFleet
from ops.simulator.link import IDEAL, LinkProfile
from ops.simulator.process import Process
from ops.simulator.program import Killed
from ops.simulator.programs import Device
from ops.simulator.world import World

__all__ = [
    "IDEAL",
    "Books",
    "Broker",
    "Device",
    "DeviceCost",
    "Fault",
    "Faults",
    "Killed",
    "LinkProfile",
    "Process",
    "ServerCost",
    "SimulatedFleet",
    "World",
]
