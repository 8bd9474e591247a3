"""The guarantees of the state gateway."""

import logging

# What gateways in the tests' own process log is looked at where it matters, and not printed between the dots.
logging.getLogger("elrar").addHandler(logging.NullHandler())
