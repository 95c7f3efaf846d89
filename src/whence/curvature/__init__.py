"""One form for all curvature: eigenvectors of the two sides and an eigenvalue per coordinate."""
