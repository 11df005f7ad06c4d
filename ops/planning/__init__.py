"""Planning a fleet before there is one: cut layers, round times, bytes, memory, advice.

model = FleetModel(settings, devices, profile.server, message_sizes(settings))
found = assign(model, each_alone(len(devices)), Limits())
found.prediction.round_s
"""

from ops.planning.advice import Advice, advise
from ops.planning.assignment import Found, Limits, assign, by_group, each_alone
from ops.planning.model import FleetModel, Prediction
from ops.planning.plan import PlanSettings, make_plan
from ops.planning.skew import Skew, skew_of

__all__ = [
    "Advice",
    "FleetModel",
    "Found",
    "Limits",
    "PlanSettings",
    "Prediction",
    "Skew",
    "advise",
    "assign",
    "by_group",
    "each_alone",
    "make_plan",
    "skew_of",
]
