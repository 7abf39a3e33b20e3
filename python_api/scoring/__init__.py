"""Judging answers: refusals by keyword lists, guard models, rubrics, multiple choice; with intervals."""
