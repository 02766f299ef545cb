"""The body: robots, simulators, the control loop, safety, evaluation. Imports without torch."""
