"""What runs on a worker: the actor, its tasks, and how it comes by the weights."""
