"""Code that the commands share: models, pictures, many prompts, comparison, FLOPs, reports."""
