//! The model as a cluster feeds it: objects of an API server, EndpointSlices, statuses, and what cannot be read.

mod endpoints;
mod objects;
mod statuses;
mod unreadable;
mod world;
