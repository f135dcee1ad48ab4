"""What a run tells while it goes, and who listens."""
