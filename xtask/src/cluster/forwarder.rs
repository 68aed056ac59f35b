//! Reaching into a network namespace from the host: listens outside, connects inside.
//!
//! A socket belongs to the namespace of the thread that makes it, so one thread enters the namespace and connects.

use std::{
    fs::File,
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    path::Path,
    sync::mpsc,
    thread,
};

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Forwards connections to `listener` for as long as the process lives.
pub fn forward(listener: &TcpListener, namespace: &Path, to: SocketAddr) -> Result<()> {
    let namespace = File::open(namespace).with_context(|| {
        format!(
            "failed to open the network namespace {}: is the cluster up?",
            namespace.display()
        )
    })?;
    let (incoming, connections) = mpsc::channel::<TcpStream>();
    let (ready, entered) = mpsc::channel();
    thread::spawn(move || {
        let inside = move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
        let is_inside = inside.is_ok();
        let _ = ready.send(inside);
        while is_inside && let Ok(client) = connections.recv() {
            // Threads that this one starts are inside as well.
            thread::spawn(move || serve(&client, to));
        }
    });
    entered
        .recv()?
        .context("failed to enter the network namespace (needs root)")?;
    // A client that went away between its connection and our accept is its own affair.
    for client in listener.incoming().flatten() {
        incoming.send(client).context("the forwarding thread has ended")?;
    }
    Ok(())
}

fn serve(client: &TcpStream, to: SocketAddr) {
    let Ok(server) = TcpStream::connect(to) else { return };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    thread::scope(|scope| {
        scope.spawn(|| copy(client, &server));
        copy(&server, client);
    });
}

/// Copies one direction and passes its end on; the other direction goes on.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
