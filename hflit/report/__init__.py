"""What a run was and how it went: facts, model card, page."""
