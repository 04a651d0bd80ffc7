"""A model of the scores: what it predicts, where it is trusted, and what it proposes."""
