"""One hypothesis profile for the suite: no deadline, few examples, the same ones on every run in CI."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "coverfast",
    deadline=None,
    max_examples=25,
    derandomize=os.environ.get("CI", "").lower() in ("1", "true"),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("coverfast")
