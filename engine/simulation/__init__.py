"""A discrete-event simulation: the engine's own scheduler and block manager, with a model of how long a step takes."""
