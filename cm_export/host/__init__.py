"""Running a bundle, on any backend and without torch: pictures and text in, core sets, the decode loop, answers out."""
