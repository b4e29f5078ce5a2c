"""What the command line can do, a file per verb: options, the work, and the tables it prints."""
