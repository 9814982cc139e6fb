//! Whether acknowledged writes would survive the primary (`durability: quorum`), as metric and console tell it.

use crate::fixture::*;

async fn told(proxy: &Proxy, covered: bool, when: &str) {
    let figure = if covered { 1.0 } else { 0.0 };
    eventually(&format!("{when}: writes are covered: {covered}"), || async {
        proxy.metrics().await.sum("highwater_sync_state", &[]) == figure
    })
    .await;
}

/// A standby is missed so late here that nothing has to be done, or recorded, when one comes or goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whether_writes_are_covered_follows_the_standbys_that_can_be_reached() {
    let cluster = Cluster::start(2).await;
    let directory = tempfile::tempdir().unwrap();
    let overrides = format!(
        "failover: {{ mode: auto, state_dir: {}, startup_grace: 1s, durability: quorum, check_interval: 100ms, \
         sync: {{ manage: true, degrade_after: 5m }} }}",
        directory.path().join("state").display()
    );
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await;
    told(&proxy, true, "once the setting is proven").await;
    for standby in [1, 2] {
        cluster.link(standby).cut();
        told(&proxy, false, "without one of two, who may have been the one that confirmed").await;
        cluster.link(standby).heal();
        told(&proxy, true, "with both again").await;
    }
    // What is recorded holds from the start, as soon as both have answered.
    for _ in 0..3 {
        proxy.restart().await;
        told(&proxy, true, "after a restart").await;
    }
}
