"""Makes data: plans, solves the teacher's trajectories, commits shards, seals manifests."""
