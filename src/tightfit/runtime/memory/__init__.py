"""What a run uses, phase by phase, beside what was planned."""
