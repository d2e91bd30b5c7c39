"""Read corpora as people have them: transcripts, folders, archives; make a synthetic one."""
