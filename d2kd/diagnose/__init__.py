"""Looking at a run before and while it trains: the dry run, the teacher's pre-flight, gradient shares."""
