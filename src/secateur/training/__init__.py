"""Fine-tuning of any task with transformers' Trainer: zeros held, several processes, resumable."""
