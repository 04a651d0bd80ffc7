"""What may vary in a merge: a genome in the unit cube, and the recipe it stands for."""
