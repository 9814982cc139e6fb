//! The status page, as a browser shows it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::browser::{self, Browser};
use crate::fixture::*;

/// The browser; without one the test says so and is over. `make page` installs and names one.
fn chromium() -> Option<PathBuf> {
    let program = browser::program();
    if program.is_none() {
        eprintln!("SKIPPED: no Chromium on this machine (`make page` installs it)");
    }
    program
}

/// Reads and writes until told to stop, so that there is something to see.
async fn traffic(client: tokio_postgres::Client, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        // A node may be taken away meanwhile: what counts is what the page says of it.
        let _ = client.simple_query("INSERT INTO t VALUES (1)").await;
        for _ in 0..4 {
            let _ = client.simple_query("SELECT x FROM t LIMIT 1").await;
        }
        // The pace of the traffic; nothing waits for it.
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

fn pictures() -> PathBuf {
    std::env::var_os("HIGHWATER_PICTURES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target/page"), PathBuf::from)
}

#[tokio::test]
async fn the_status_page_is_readable_in_a_browser_light_dark_narrow_and_without_scripts() {
    let Some(program) = chromium() else { return };
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut working = Vec::new();
    for _ in 0..4 {
        working.push(tokio::spawn(traffic(proxy.connect().await, stop.clone())));
    }
    let mut browser = Browser::start(&program).await;
    browser.window(1100, 1200, "light").await;
    let url = format!("http://127.0.0.1:{}/", proxy.http_port());
    browser.open(&url).await;

    // It refreshes by itself: no reload, and what it says goes on.
    browser.evaluate("window.mine = 1").await;
    let shown = browser.evaluate("document.querySelector('.clock').textContent").await;
    watch(
        &mut browser,
        "the clock goes on",
        |text| *text != shown,
        "document.querySelector('.clock').textContent",
    )
    .await;
    assert_eq!(browser.evaluate("window.mine").await, json!(1));
    // A replica that goes, and comes back.
    const FIRST_EVENT: &str = "document.querySelector('.events li')?.textContent";
    let about_c = |text: &serde_json::Value, what: &str| text.as_str().is_some_and(|t| t.contains(what));
    cluster.link(2).cut();
    watch(
        &mut browser,
        "its loss is told",
        |t| about_c(t, "c is not used: it cannot be reached"),
        FIRST_EVENT,
    )
    .await;
    cluster.link(2).heal();
    watch(&mut browser, "its return is told", |t| about_c(t, "c serves reads"), FIRST_EVENT).await;
    // For pictures that show more than a few seconds: as long as HIGHWATER_PAGE_SECONDS says.
    let seconds = std::env::var("HIGHWATER_PAGE_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    tokio::time::sleep(Duration::from_secs(seconds)).await;

    const GROUND: &str = "getComputedStyle(document.body).backgroundColor";
    let light = browser.evaluate(GROUND).await;
    browser.screenshot(&pictures().join("light.png")).await;
    browser.window(1100, 1200, "dark").await;
    assert_ne!(browser.evaluate(GROUND).await, light);
    browser.screenshot(&pictures().join("dark.png")).await;
    for width in [375, 320, 768] {
        browser.window(width, 800, "light").await;
        let wide = browser.evaluate("document.documentElement.scrollWidth").await;
        assert_eq!(wide, json!(width), "it scrolls sideways at {width}");
        let cut = browser
            .evaluate(
                "[...document.querySelectorAll('td, dd, li, h2')].filter(e => e.scrollWidth > e.clientWidth + 1 \
                 && getComputedStyle(e).display !== 'inline' && e.clientWidth > 1).map(e => e.textContent)",
            )
            .await;
        assert_eq!(cut, json!([]), "text is cut off at {width}");
        if width == 375 {
            browser.screenshot(&pictures().join("narrow.png")).await;
        }
    }
    assert_eq!(browser.complaints, Vec::<String>::new());

    // Without scripts, all tables are there, and the browser loads the page anew by itself.
    browser.ask("Emulation.setScriptExecutionDisabled", json!({ "value": true })).await;
    browser.open(&url).await;
    let text = browser.evaluate("document.body.innerText").await;
    for what in ["ready", "Writes go to", "primary", "replica", "Replay lag", "c serves reads"] {
        assert!(text.as_str().unwrap().contains(what), "{what}: {text}");
    }
    let shown = browser.evaluate("document.querySelector('.clock').textContent").await;
    watch(
        &mut browser,
        "it is loaded anew",
        |text| *text != shown,
        "document.querySelector('.clock')?.textContent",
    )
    .await;
    browser.ask("Emulation.setScriptExecutionDisabled", json!({ "value": false })).await;

    // And it says so when the proxy is gone.
    browser.open(&url).await;
    stop.store(true, Ordering::Relaxed);
    for task in working {
        task.await.unwrap();
    }
    assert!(proxy.stop().await.success());
    const BANNER: &str = "getComputedStyle(document.getElementById('stale')).display";
    watch(&mut browser, "it says that it is old", |display| display == "block", BANNER).await;
    browser.close().await;
}

/// Looks at `expression` until it is as wanted.
async fn watch(
    browser: &mut Browser,
    what: &str,
    wanted: impl Fn(&serde_json::Value) -> bool,
    expression: &str,
) {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let value = browser.evaluate(expression).await;
        if wanted(&value) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "never came true: {what}; last: {value}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn with_a_token_the_page_and_the_metrics_ask_for_it_and_the_proxys_own_check_does_not() {
    let cluster = Cluster::start(0).await;
    let overrides = "http_token: hidden-word";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, start: Start::Ready }).await;
    for path in ["/", "/metrics", "/topology"] {
        assert_eq!(proxy.get(path).await.unwrap().0, 401, "{path}");
        let (status, _) = proxy.get_with(path, "Authorization: Bearer hidden-word\r\n").await.unwrap();
        assert_eq!(status, 200, "{path}");
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(proxy.get(path).await.unwrap().0, 200, "{path}");
    }
    // Another one by a reload.
    let file = proxy.directory().join("config.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("hidden-word"), "{text}");
    std::fs::write(&file, text.replace("hidden-word", "another-word")).unwrap();
    proxy.signal(nix::sys::signal::Signal::SIGHUP);
    let status = async |token: &str| {
        let header = format!("Authorization: Bearer {token}\r\n");
        proxy.get_with("/metrics", &header).await.map(|(status, _)| status)
    };
    eventually("the new token is asked for", || async { status("another-word").await == Some(200) }).await;
    assert_eq!(status("hidden-word").await, Some(401));
    assert!(!proxy.log().contains("hidden-word") && !proxy.log().contains("another-word"));
}
