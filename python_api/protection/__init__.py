"""Fine-tuning that leaves chosen directions alone: sites, modes, audit, callback."""
