"""Results for people and programs: texts, matrices, cards, figures, pages."""
