//! Traffic state under concurrency and across revisions.
