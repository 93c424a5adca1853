"""Hold zeros while a user trains, as a context and as a Trainer callback; and the distillation loss."""
