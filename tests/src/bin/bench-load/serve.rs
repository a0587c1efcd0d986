//! The server: one thread, one epoll, answers of `x` as long as the request asks.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
};

use anyhow::{Context, Result};
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use crate::http;

/// How much of a body is written at once.
const FILLER: usize = 256 * 1024;
/// How much is read at once.
const BUFFER: usize = 16 * 1024;
/// Events taken at once.
const EVENTS: usize = 256;

struct Connection {
    stream: TcpStream,
    input: Vec<u8>,
    /// What waits to be written: a head, then this many bytes of filler.
    head: Vec<u8>,
    left: u64,
    close: bool,
}

/// Serves until it is killed.
pub fn run(ports: &[&str]) -> Result<()> {
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    let mut listeners = Vec::new();
    for port in ports {
        let port: u16 = port.parse().with_context(|| format!("port {port}"))?;
        let listener = TcpListener::bind(("::", port)).with_context(|| format!("listen on port {port}"))?;
        listener.set_nonblocking(true)?;
        // The backlog of the standard library, 128, is too small for bursts of new connections.
        rustix::net::listen(&listener, 4096)?;
        epoll::add(
            &epoll,
            &listener,
            EventData::new_u64(listeners.len() as u64),
            EventFlags::IN,
        )?;
        listeners.push(listener);
    }
    let mut server = Server {
        connections: Vec::new(),
        free: Vec::new(),
        buffer: vec![0; BUFFER],
        filler: vec![b'x'; FILLER],
    };
    let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
    loop {
        events.clear();
        match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        for event in &events {
            let number = event.data.u64() as usize;
            match listeners.get(number) {
                Some(listener) => server.accept(listener, &epoll, listeners.len()),
                None => server.serve(number - listeners.len()),
            }
        }
    }
}

struct Server {
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    buffer: Vec<u8>,
    filler: Vec<u8>,
}

impl Server {
    /// Takes all that wait. Who went away before is the other side's matter.
    fn accept(&mut self, listener: &TcpListener, epoll: &impl std::os::fd::AsFd, offset: usize) {
        while let Ok((stream, _)) = listener.accept() {
            if stream
                .set_nonblocking(true)
                .and_then(|()| stream.set_nodelay(true))
                .is_err()
            {
                continue;
            }
            let slot = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let data = EventData::new_u64((slot + offset) as u64);
            let interest = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
            if epoll::add(epoll, &stream, data, interest).is_err() {
                self.free.push(slot);
                continue;
            }
            self.connections[slot] = Some(Connection {
                stream,
                input: Vec::new(),
                head: Vec::new(),
                left: 0,
                close: false,
            });
            // Its request is often there already.
            self.serve(slot);
        }
    }

    fn serve(&mut self, slot: usize) {
        let Some(Some(connection)) = self.connections.get_mut(slot) else {
            return;
        };
        if !matches!(connection.step(&mut self.buffer, &self.filler), Ok(true)) {
            self.connections[slot] = None;
            self.free.push(slot);
        }
    }
}

impl Connection {
    /// Goes as far as the socket lets it; `false` at the end.
    fn step(&mut self, buffer: &mut [u8], filler: &[u8]) -> io::Result<bool> {
        loop {
            if !self.write(filler)? {
                return Ok(true);
            }
            if self.close {
                return Ok(false);
            }
            match http::read_request(&self.input).map_err(|_| ErrorKind::InvalidData)? {
                Some(asked) => {
                    self.input.drain(..asked.length);
                    self.close = asked.close;
                    self.left = asked.bytes;
                    let close = if asked.close { "connection: close\r\n" } else { "" };
                    write!(
                        self.head,
                        "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: {}\r\n{close}\r\n",
                        asked.bytes
                    )?;
                    // Head and the first bytes leave together.
                    let first = usize::try_from(self.left).unwrap_or(filler.len()).min(filler.len());
                    self.head.extend_from_slice(&filler[..first]);
                    self.left -= first as u64;
                }
                None => match self.stream.read(buffer) {
                    Ok(0) => return Ok(false),
                    Ok(count) => self.input.extend_from_slice(&buffer[..count]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                    Err(error) => return Err(error),
                },
            }
        }
    }

    /// Writes what waits; `false` if some of it must wait longer.
    fn write(&mut self, filler: &[u8]) -> io::Result<bool> {
        while !self.head.is_empty() || self.left > 0 {
            let part = match self.head.is_empty() {
                false => &self.head[..],
                true => &filler[..usize::try_from(self.left).unwrap_or(filler.len()).min(filler.len())],
            };
            match self.stream.write(part) {
                Ok(count) if self.head.is_empty() => self.left -= count as u64,
                Ok(count) => drop(self.head.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
