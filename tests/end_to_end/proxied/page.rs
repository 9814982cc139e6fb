//! The status page, as a browser shows it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use highwater::demo::cluster::{Login, connect};
use serde_json::{Value, json};

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
async fn traffic(port: u16, app: Login, stop: Arc<AtomicBool>) {
    let mut client = None;
    while !stop.load(Ordering::Relaxed) {
        // A primary that dies takes sessions with it.
        if client.as_ref().is_none_or(tokio_postgres::Client::is_closed) {
            client = connect(port, "app", &app).await.ok();
        }
        if let Some(client) = &client {
            // A node may be taken away meanwhile: what counts is what the page says of it.
            let _ = client.simple_query("INSERT INTO t VALUES (1)").await;
            for _ in 0..4 {
                let _ = client.simple_query("SELECT x FROM t LIMIT 1").await;
            }
        }
        // The pace of the traffic; nothing waits for it.
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

fn pictures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/page")
}

const CLOCK: &str = "document.querySelector('.clock')?.textContent";
const FIRST_EVENT: &str = "document.querySelector('.events li')?.textContent";

fn says(value: &Value, what: &str) -> bool {
    value.as_str().is_some_and(|text| text.contains(what))
}

#[tokio::test]
async fn the_status_page_is_readable_in_a_browser_light_dark_narrow_and_without_scripts() {
    let Some(program) = chromium() else { return };
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let directory = tempfile::tempdir().unwrap();
    let overrides = format!(
        "failover: {{ mode: manual, state_dir: '{}', pause_timeout: 2m }}",
        directory.path().join("state").display()
    );
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await;
    let stop = Arc::new(AtomicBool::new(false));
    let working: Vec<_> =
        (0..4).map(|_| tokio::spawn(traffic(proxy.port(), proxy.app().clone(), stop.clone()))).collect();
    let mut browser = Browser::start(&program).await;
    browser.window(1100, 1200, "light").await;
    let url = format!("http://127.0.0.1:{}/", proxy.http_port());
    browser.open(&url).await;

    refreshes_by_itself(&mut browser).await;
    tells_what_happens(&mut browser, &cluster).await;
    follows_a_switchover(&mut browser, &cluster, &proxy).await;
    assert_eq!(browser.complaints, Vec::<String>::new());
    works_without_scripts(&mut browser, &url).await;

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

/// No reload, and what it says goes on.
async fn refreshes_by_itself(browser: &mut Browser) {
    browser.evaluate("window.mine = 1").await;
    let shown = browser.evaluate(CLOCK).await;
    watch(browser, "the clock goes on", |text| *text != shown, CLOCK).await;
    assert_eq!(browser.evaluate("window.mine").await, json!(1));
}

/// A replica that goes and comes back.
async fn tells_what_happens(browser: &mut Browser, cluster: &Cluster) {
    cluster.link(2).cut();
    let lost = "c is not used: it cannot be reached";
    watch(browser, "its loss is told", |text| says(text, lost), FIRST_EVENT).await;
    cluster.link(2).heal();
    watch(browser, "its return is told", |text| says(text, "c serves reads"), FIRST_EVENT).await;
    // For pictures that show more than a few seconds.
    tokio::time::sleep(Duration::from_secs(seconds())).await;
}

/// How long there is traffic before the pictures are taken, as HIGHWATER_PAGE_SECONDS says.
fn seconds() -> u64 {
    std::env::var("HIGHWATER_PAGE_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(0)
}

/// The console exchanges the primary: the page says what is being done while an open transaction is waited for, and
/// then who is the primary.
async fn follows_a_switchover(browser: &mut Browser, cluster: &Cluster, proxy: &Proxy) {
    const STATE: &str = "[...document.querySelectorAll('.facts div')].find(d => \
        d.querySelector('dt').textContent === 'state')?.querySelector('dd').textContent";
    const WAITING: &str = "[...document.querySelectorAll('.facts div')].find(d => \
        d.querySelector('dt').textContent === 'statements waiting')?.querySelector('dd').textContent";
    let mut busy = proxy.raw_login().await;
    busy.ask(&query("BEGIN; INSERT INTO t VALUES (2)")).await;
    let console = super::console::console(cluster, proxy).await;
    let ordered = tokio::spawn(async move { console.batch_execute("SWITCHOVER TO b TIMEOUT 2m").await });
    watch(browser, "it waits for a transaction", |text| says(text, "draining"), STATE).await;
    // The four that write wait for the new primary.
    watch(browser, "and clients wait", |text| says(text, "4"), WAITING).await;
    fits_every_screen(browser).await;
    assert_eq!(tags(&busy.ask(&query("COMMIT")).await), "CZ");
    ordered.await.unwrap().unwrap();
    watch(browser, "the new primary is shown", |text| says(text, "b is the primary"), "document.title").await;
    const HISTORY: &str = "document.querySelector('[data-label=primary]')?.textContent";
    watch(browser, "the change is in the history", |text| says(text, "a → b"), HISTORY).await;
    const TILES: &str = "document.querySelector('.tiles').textContent";
    watch(browser, "a replica serves again", |text| says(text, "1 replica serves"), TILES).await;
    tokio::time::sleep(Duration::from_secs(seconds() / 4)).await;
    browser.window(1100, 1200, "light").await;
    browser.screenshot(&pictures().join("after.png")).await;
}

async fn fits_every_screen(browser: &mut Browser) {
    const GROUND: &str = "getComputedStyle(document.body).backgroundColor";
    let light = browser.evaluate(GROUND).await;
    browser.screenshot(&pictures().join("light.png")).await;
    browser.window(1100, 1200, "dark").await;
    assert_ne!(browser.evaluate(GROUND).await, light);
    browser.screenshot(&pictures().join("dark.png")).await;
    const CUT_OFF: &str = "[...document.querySelectorAll('td, dd, li, h2')].filter(e => \
        e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline' && e.clientWidth > 1)\
        .map(e => e.textContent)";
    for width in [375, 320, 768] {
        browser.window(width, 800, "light").await;
        let wide = browser.evaluate("document.documentElement.scrollWidth").await;
        assert_eq!(wide, json!(width), "it scrolls sideways at {width}");
        assert_eq!(browser.evaluate(CUT_OFF).await, json!([]), "text is cut off at {width}");
        if width == 375 {
            browser.screenshot(&pictures().join("narrow.png")).await;
        }
    }
}

/// All tables are there, and the browser loads the page anew.
async fn works_without_scripts(browser: &mut Browser, url: &str) {
    browser.ask("Emulation.setScriptExecutionDisabled", json!({ "value": true })).await;
    browser.open(url).await;
    let text = browser.evaluate("document.body.innerText").await;
    for what in ["ready", "Writes go to", "primary", "replica", "Replay lag", "c serves reads", "a → b"] {
        assert!(says(&text, what), "{what}: {text}");
    }
    let shown = browser.evaluate(CLOCK).await;
    watch(browser, "it is loaded anew", |text| !text.is_null() && *text != shown, CLOCK).await;
    browser.ask("Emulation.setScriptExecutionDisabled", json!({ "value": false })).await;
}

/// Looks at `expression` until it is as wanted.
async fn watch(browser: &mut Browser, what: &str, wanted: impl Fn(&Value) -> bool, expression: &str) {
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
    let proxy = Proxy::start_with(
        &cluster,
        ProxyOptions { overrides, start: Start::Ready, ..ProxyOptions::default() },
    )
    .await;
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
