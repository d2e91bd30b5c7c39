"""Read corpora as users have them: transcripts, folders, archives; make a synthetic one."""
