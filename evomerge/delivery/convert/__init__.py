"""`evomerge convert`: configs of mergekit-evolve, mergenetic and mergekit become run configs."""
