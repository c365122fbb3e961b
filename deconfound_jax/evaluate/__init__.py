"""How rewards and policies are judged: on randomized arms, and against a simulation's truth."""
