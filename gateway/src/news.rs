//! What other gateways on the same log do, for those who watch and write here.

use crate::{
    Gateway,
    live::Channel,
    store::{Progress, StoreError, news::News},
};

/// Passes it on until the gateway stops.
pub async fn run(gateway: &Gateway) {
    let Some(mut news) = gateway.log.news() else { return };
    loop {
        let news = tokio::select! {
            news = news.recv() => news,
            () = gateway.shutdown.cancelled() => return,
        };
        match news {
            Some(News::Missed) => {
                if let Err(error) = look(gateway).await {
                    tracing::warn!(%error, "what other gateways did is not known");
                }
            }
            Some(news) => take(gateway, news),
            None => return,
        }
    }
}

fn take(gateway: &Gateway, news: News) {
    match news {
        News::Stored { session, progress } => {
            if let Some(channel) = gateway.live.known(&session) {
                stored(&channel, progress);
            }
        }
        News::Admitted { session, epoch } => {
            if let Some(channel) = gateway.live.known(&session) {
                channel.admitted(epoch);
            }
        }
        News::Commanded { session } => {
            if let Some(channel) = gateway.live.known(&session) {
                channel.commanded();
            }
        }
        News::Delta { session, delta } => {
            if let Some(channel) = gateway.live.known(&session) {
                channel.delta(delta);
            }
        }
        News::Missed => {}
    }
}

/// Readers take the records from the log.
fn stored(channel: &Channel, progress: Progress) {
    channel.stored(Vec::new, 0, progress);
}

/// Said when the log knows less than it did.
pub const OLDER: &str = "the event log is older than what this gateway knows of it: a copy was put back; runners deliver again what they still have";

/// Asks the log about all sessions that somebody watches or writes here.
async fn look(gateway: &Gateway) -> Result<(), StoreError> {
    for (session, channel) in gateway.live.all() {
        // Before the log is asked: an admission is heard of when it is in the log, so what was heard by now must be there.
        let heard = channel.newest();
        let state = gateway.log.state(&session).await?;
        if state.epoch < heard {
            tracing::warn!(session_uid = session, seen = state.epoch, heard, "{OLDER}");
            channel.went_back(state.epoch);
        }
        channel.admitted(state.epoch);
        channel.commanded();
        stored(&channel, state.progress);
    }
    Ok(())
}
